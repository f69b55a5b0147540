#!/usr/bin/env bash
# A Ray on this machine: with a token, on the loopback, recorded below the storage root.
#
#   cluster/local.sh up [--port P] [--dashboard-port P] [--cpus N] [--object-store-gb G]
#   cluster/local.sh status
#   cluster/local.sh down
#
# `up` again finds the one that runs. `down` ends it and nothing else. What it needs is made by `make setup`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
if ! [ -x "$python" ]; then
  python=$(command -v python3.11 || command -v python3 || true)
  if [ -z "$python" ] || ! "$python" -c 'import ray' 2>/dev/null; then
    echo "cluster/local.sh: there is no .venv in $PWD, and no Python with Ray on the PATH: run \`make setup\`" >&2
    exit 2
  fi
fi
exec "$python" -m jobs.local "$@"
