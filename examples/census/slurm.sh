#!/usr/bin/env bash
# From the CELLxGENE Census to a shard set on a Slurm cluster.
#
#   SHARES=64 bash examples/census/slurm.sh scGPT_human_vocab.json /shared/atlas
#
# Each step is submitted now and starts when the one before has ended well:
#   1. an array of one task for each query: its index
#   2. one job: which queries share cells, and the vocabulary
#   3. ../slurm/pack.sh: two arrays of SHARES tasks and a last job make /shared/atlas/shards, straight from
#      the Census
# The nodes must reach the Census, and all of them must see /shared/atlas. If a step fails, mend the cause
# and run the same command again: what is done is not done again. What follows is given to `scshards pack`,
# such as --cells-per-shard 20000. From the environment:
#
#   QUERIES         names, with spaces between; as it is: those of scGPT's human atlas of normal cells
#   QUERIES_FILE    your copy of the file of queries
#   SHARES          tasks that pack; 16
#   HELD_OUT        share of the donors that is held out; 0.01
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export VOCAB=$1 ATLAS=$2
export QUERIES=${QUERIES:-heart blood brain lung kidney intestine pancreas others}
shift 2
read -r -a queries <<<"$QUERIES"
inputs=()
for name in "${queries[@]}"; do
  inputs+=("census://$name?index=$ATLAS/index")
done

index=$(sbatch --parsable --array="1-${#queries[@]}" "$here/index.sbatch")
vocab=$(sbatch --parsable --dependency="afterok:$index" "$here/index.sbatch")
echo "submitted: $index (index), then $vocab (vocabulary)"
AFTER=$vocab exec bash "$here/../slurm/pack.sh" "${inputs[@]}" -o "$ATLAS/shards" \
  --vocab "$ATLAS/vocab.json" --gene-column feature_name \
  --obs cell_type,tissue_general,disease,assay,sex,dataset_id \
  --valid-fraction "${HELD_OUT:-0.01}" --split-by donor_id "$@"
