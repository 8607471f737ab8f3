#!/usr/bin/env bash
# iproute2, for tests with several hosts as network namespaces (where it cannot be had, they are skipped and say so), and
# libibverbs1, without which Mooncake does not load even where it goes over TCP.
set -uo pipefail

packages=()
command -v ip >/dev/null && command -v tc >/dev/null || packages+=(iproute2)
ldconfig -p | grep -q libibverbs.so.1 || packages+=(libibverbs1)
((${#packages[@]})) || exit 0
if [[ $(id -u) -eq 0 ]] && command -v apt-get >/dev/null; then
    echo "network_tools.sh: installing ${packages[*]}" >&2
    apt-get update -qq </dev/null >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" </dev/null >&2
fi
command -v tc >/dev/null || echo "network_tools.sh: no iproute2: tests with several hosts will be skipped" >&2
exit 0
