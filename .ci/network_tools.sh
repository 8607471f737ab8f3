#!/usr/bin/env bash
# iproute2, for tests with several hosts as network namespaces. Where it cannot be had, they are skipped and say so.
set -uo pipefail

command -v ip >/dev/null && command -v tc >/dev/null && exit 0
if [[ $(id -u) -eq 0 ]] && command -v apt-get >/dev/null; then
    echo "network_tools.sh: installing iproute2" >&2
    apt-get update -qq </dev/null >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends iproute2 </dev/null >&2
fi
command -v tc >/dev/null || echo "network_tools.sh: no iproute2: tests with several hosts will be skipped" >&2
exit 0
