"""What holds for every test below this folder."""

from hypothesis import settings

# the machines that run this are shared: how long an example takes says nothing about the code
settings.register_profile("shared-machine", deadline=None, print_blob=True)
settings.load_profile("shared-machine")
