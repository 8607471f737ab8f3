"""python tests/fuzz/fuzz_header.py WORK_FOLDER -max_total_time=300; see docs/guides/fuzzing.md."""

from driver import main

if __name__ == "__main__":
    main("header")
