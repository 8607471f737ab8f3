#!/usr/bin/env bash
# Run parts of the test suite one after the other, each as `make PART`, and print what each took.
#
#   .ci/parts.sh PART...
#
# A failing part does not keep the others from running, except the first, the set-up. Exit status 1 where any failed.
# PART_TIMEOUT bounds each part (45m). PREPARE names parts that begin in the background after the first: set-up which later
# parts need. Their turn comes as well, waits for them, and tells what failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TIMED_OUT=124
timeout=${PART_TIMEOUT:-45m}
rows=()
failed=0
began_s=$SECONDS

minutes() { awk -v seconds="$1" 'BEGIN { printf "%.2f", seconds / 60 }'; }

verdict() {
    case $1 in
        0) echo ok ;;
        "$TIMED_OUT") echo "FAILED: over $timeout" ;;
        *) echo "FAILED" ;;
    esac
}

print_table() {
    printf '\n%-18s %8s  %s\n' part minutes result
    for row in "${rows[@]}"; do
        IFS='|' read -r part taken result <<<"$row"
        printf '%-18s %8s  %s\n' "$part" "$taken" "$result"
    done
    printf '%-18s %8s\n' total "$(minutes $((SECONDS - began_s)))"
}

prepare() {
    [[ -n ${PREPARE:-} ]] || return 0
    mkdir -p .cache
    nice -n 10 "${MAKE:-make}" --no-print-directory $PREPARE &>.cache/prepare.log </dev/null &
}

trap 'rows+=("$part|-|interrupted"); print_table; exit 130' INT TERM

for part in "$@"; do
    printf '\n==== %s\n' "$part"
    part_began_s=$SECONDS
    # in the foreground: a background job would hand SIGINT ignored to every process under test
    timeout --foreground --kill-after=30s "$timeout" "${MAKE:-make}" --no-print-directory "$part"
    status=$?
    rows+=("$part|$(minutes $((SECONDS - part_began_s)))|$(verdict $status)")
    if ((status != 0)); then
        failed=1
        [[ $part == "$1" ]] && break
    fi
    [[ $part != "$1" ]] || prepare
done
print_table
exit $failed
