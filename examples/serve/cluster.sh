#!/bin/sh
# One API for engines on several machines, by vLLM's own data parallelism: the first machine has the API, which gives
# each request to the least busy engine; the others have engines only. The model's directory is the same everywhere.
#   first machine:  NODES=2 RANK=0 HEAD=10.0.0.1 examples/serve/cluster.sh my-tah --port 8000
#   the second:     NODES=2 RANK=1 HEAD=10.0.0.1 examples/serve/cluster.sh my-tah
# ENGINES per machine; each of TP processes that split the weights. Further flags are vLLM's. Restart a machine that
# ends, as with one server; where the first ends, all do.
set -eu
: "${NODES:?machines}" "${RANK:?this machine, from 0}" "${HEAD:?address of the first machine}"
ENGINES=${ENGINES:-1} TP=${TP:-1}
MODEL=${1:?model}
shift
set -- --data-parallel-size "$((NODES * ENGINES))" --data-parallel-size-local "$ENGINES" \
    --data-parallel-address "$HEAD" --data-parallel-rpc-port "${RPC_PORT:-13345}" --tensor-parallel-size "$TP" "$@"
if [ "$RANK" -gt 0 ]; then
    set -- --headless --data-parallel-start-rank "$((RANK * ENGINES))" "$@"
fi
exec ${TAH:-tah} serve "$MODEL" "$@"
