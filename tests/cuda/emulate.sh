#!/bin/sh
# emulate.sh CUDAEMU-RUN PROGRAM ARGUMENTS...: under a schedule of its own, or the one that CUDAEMU_SEED names.
export CUDAEMU_SEED="${CUDAEMU_SEED:-$(od -An -N3 -tu4 /dev/urandom | tr -d ' ')}"
echo "CUDAEMU_SEED=$CUDAEMU_SEED"
exec "$@"
