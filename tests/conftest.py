"""What holds for every test below this folder."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # modules that several folders share: tests are imported by their paths

# the machines that run this are shared: how long an example takes says nothing about the code
settings.register_profile("shared-machine", deadline=None, print_blob=True)
settings.load_profile("shared-machine")
