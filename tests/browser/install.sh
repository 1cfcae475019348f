#!/bin/sh
# Chromium for tests/browser, on Debian as root; anywhere else, or without a network, it says why not and changes
# nothing: those tests then skip. Never fails.
for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then exit 0; fi
done
say() { echo "browser tests will be skipped: no chromium, and $1" >&2; exit 0; }
command -v apt-get >/dev/null || say "this is not Debian (install chromium yourself)"
[ "$(id -u)" = 0 ] || say "not root (apt-get install chromium)"
[ -z "${NO_CHROMIUM:-}" ] || say "NO_CHROMIUM is set"
log=$(mktemp)
# All bounded in time: a mirror may not answer.
install() { DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -q -o Acquire::Retries=0 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=60 install -y --no-install-recommends chromium >"$log" 2>&1; }
echo "installing chromium for the browser tests" >&2
install || { timeout 120 apt-get -q -o Acquire::Retries=0 -o Acquire::http::Timeout=20 update >/dev/null 2>&1 && install; } \
    || say "apt-get could not install it: $(tail -n 1 "$log")"
rm -f "$log"
exit 0
