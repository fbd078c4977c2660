#!/bin/sh
# compile.sh LOG COMMAND...: runs a compiler and keeps what it reports (registers, spills) in LOG, shown if it fails.
log=$1
shift
"$@" 2>"$log" || {
  cat "$log" >&2
  exit 1
}
grep -i warning "$log" >&2 || true
