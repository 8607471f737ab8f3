"""Generated checkpoints, small enough to be written by every test that wants one."""
