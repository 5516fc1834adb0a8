#!/usr/bin/env bash
# From the CELLxGENE Census to a model, on one machine: index, vocabulary, shards, training.
#
#   bash examples/census/build_atlas.sh scGPT_human_vocab.json atlas
#   QUERIES="heart blood brain lung kidney intestine pancreas others" CONFIG=scgpt_51m \
#     bash examples/census/build_atlas.sh scGPT_human_vocab.json atlas
#
# The first argument is a vocabulary, whose ids stay as they are; the second is the folder to make:
#
#   atlas/index         which cells the queries take, of which release
#   atlas/vocab.json    the vocabulary, with the genes of the Census that it lacked
#   atlas/shards        the shard set: no h5ad file is written on the way
#   atlas/run           the model
#
# What follows is given to `scshards train`, such as --set run.steps=1000. From the environment:
#
#   QUERIES         names, with spaces between; as it is: three small organs, some 0.7 million cells
#   QUERIES_FILE    your copy of the file of queries (scshards census list names the shipped one)
#   CONFIG          of the training; as it is: start.toml beside this script
#   HELD_OUT        share of the donors that is held out; 0.03
#   WORKERS         processes that pack; one for each core
#
# Whenever it stops, run it again: what is done is not done again.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0" >&2
  exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
vocab=$1 atlas=$2
shift 2
read -r -a queries <<<"${QUERIES:-kidney pancreas intestine}"
file=()
if [ -n "${QUERIES_FILE:-}" ]; then file=(--queries "$QUERIES_FILE"); fi

inputs=()
for name in "${queries[@]}"; do
  inputs+=("census://$name?index=$atlas/index")
done

scshards census index "${queries[@]}" ${file[@]+"${file[@]}"} -o "$atlas/index"

if [ ! -e "$atlas/vocab.json" ]; then
  scshards vocab expand "$vocab" "${inputs[@]}" --gene-column feature_name --id-column feature_id \
    -o "$atlas/vocab.json"
fi

if [ ! -e "$atlas/shards/manifest.json" ]; then
  scshards pack "${inputs[@]}" -o "$atlas/shards" --vocab "$atlas/vocab.json" --gene-column feature_name \
    --obs cell_type,tissue_general,disease,assay,sex,dataset_id \
    --valid-fraction "${HELD_OUT:-0.03}" --split-by donor_id ${WORKERS:+--workers "$WORKERS"}
fi
scshards info "$atlas/shards"

exec scshards train "$atlas/shards" -o "$atlas/run" --config "${CONFIG:-$here/start.toml}" "$@"
