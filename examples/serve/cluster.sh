#!/bin/sh
# Serve one API with engines on several machines, by vLLM's data parallelism. The first machine has the API, which sends
# each request to the least busy engine. The other machines have engines only. All machines need the model at the same
# path.
#   first machine:  NODES=2 RANK=0 HEAD=10.0.0.1 examples/serve/cluster.sh my-tah --port 8000
#   second machine: NODES=2 RANK=1 HEAD=10.0.0.1 examples/serve/cluster.sh my-tah
# ENGINES is the number of engines per machine, TP the number of processes per engine, which split the weights. All
# other flags are flags of vLLM. If the process of a machine ends, restart it, as with one server. If that of the first
# machine ends, all end.
set -eu
: "${NODES:?number of machines}" "${RANK:?number of this machine, from 0}" "${HEAD:?address of the first machine}"
ENGINES=${ENGINES:-1} TP=${TP:-1}
MODEL=${1:?directory of the model}
shift
set -- --data-parallel-size "$((NODES * ENGINES))" --data-parallel-size-local "$ENGINES" \
    --data-parallel-address "$HEAD" --data-parallel-rpc-port "${RPC_PORT:-13345}" --tensor-parallel-size "$TP" "$@"
if [ "$RANK" -gt 0 ]; then
    set -- --headless --data-parallel-start-rank "$((RANK * ENGINES))" "$@"
fi
exec ${TAH:-tah} serve "$MODEL" "$@"
