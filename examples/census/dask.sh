#!/usr/bin/env bash
# Packs the cells of an index on a dask cluster.
#
#   bash examples/census/dask.sh tcp://head:8786 /shared/atlas
#   bash examples/census/dask.sh local atlas                      a cluster on this machine
#
# A cluster is a scheduler and workers of one thread each, with scshards[census,dask] of the same version:
#
#   dask scheduler                                                         on one node
#   dask worker tcp://head:8786 --nworkers 16 --nthreads 1 --no-dashboard  on each of the others
#
# The folder has an index and a vocabulary already, as after the first steps of build_atlas.sh or slurm.sh;
# shards go to its `shards`, or where OUTPUT says. What follows is given to `scshards pack`. Every worker must reach the Census and
# see the folder; with OUTPUT=s3://bucket/atlas in place of it, name a shared folder with --scratch. A worker that
# is lost is replaced by the others, and the same command goes on with a pack that was stopped.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
address=$1 atlas=$2
shift 2
inputs=()
for mark in "$atlas"/index/*.json; do
  inputs+=("census://$(basename "$mark" .json)?index=$atlas/index")
done
exec scshards pack "${inputs[@]}" -o "${OUTPUT:-$atlas/shards}" --vocab "$atlas/vocab.json" --gene-column feature_name \
  --obs cell_type,tissue_general,disease,assay,sex,dataset_id \
  --valid-fraction "${HELD_OUT:-0.01}" --split-by donor_id --dask "$address" "$@"
