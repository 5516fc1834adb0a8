#!/usr/bin/env bash
# Packs an atlas on a Slurm cluster: what follows is given to `scshards pack`.
#
#   SHARES=64 bash examples/slurm/pack.sh '/data/*.h5ad' -o /shared/atlas --vocab vocab.json --obs cell_type
#
# Three steps, each submitted now and started when the one before has ended well:
#   1. an array of SHARES tasks: each packs its share of the cells into spill files
#   2. the same array again: each writes its share of the shards
#   3. one job: does what is missing, if anything, and publishes the manifest
# Inputs, output and temporary files must lie where every node sees them: name a shared folder with
# --scratch when the output is in an object store. If a step fails, mend the cause and run the same
# command again: what is done is not done again. AFTER is a job to wait for, if there is one.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
shares=${SHARES:-16}

after=()
if [ -n "${AFTER:-}" ]; then after=(--dependency="afterok:$AFTER"); fi
first=$(sbatch --parsable --array="1-$shares" ${after[@]+"${after[@]}"} "$here/pack.sbatch" "$@")
second=$(sbatch --parsable --array="1-$shares" --dependency="afterok:$first" "$here/pack.sbatch" "$@")
last=$(sbatch --parsable --dependency="afterok:$second" "$here/pack.sbatch" "$@")
echo "submitted: $first (cells), then $second (shards), then $last (manifest)"
