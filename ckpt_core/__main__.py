"""`python -m ckpt_core`: the same as `ckpt`."""

from ckpt_core.cli import main

if __name__ == "__main__":
    main()
