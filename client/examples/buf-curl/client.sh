#!/usr/bin/env bash
# Calls an expertd server from the shell: the server itself says, by gRPC reflection, what its messages look like.
set -euo pipefail

if (($# < 1 || $# > 2)); then
  echo "usage: client.sh HOST:PORT [REQUEST.json]" >&2
  exit 2
fi
server=$1

call() { # METHOD JSON; what begins with @ is a file
  buf curl --protocol grpc --http2-prior-knowledge --data "$2" "http://$server/$1"
}

little_endian() { # the numbers as int32, in base64
  local number
  for number; do
    printf "$(printf '\\x%02x' $((number & 255)) $((number >> 8 & 255)) $((number >> 16 & 255)) $((number >> 24 & 255)))"
  done | base64 | tr -d '\n'
}

repeated() { # COUNT BYTES, in base64
  local count=$1 bytes=$2
  for ((i = 0; i < count; i++)); do printf "$bytes"; done | base64 | tr -d '\n'
}

if (($# == 2)); then
  call expertd.v1.ExpertShard/Execute "@$2"
  exit
fi

call grpc.health.v1.Health/Check '{"service": "expertd.v1.ExpertShard"}'
shard=$(call expertd.v1.ExpertShard/GetShard '{}')
jq 'del(.layers, .experts)' <<<"$shard"

# One token whose values are all 1, for the server's first experts, each with weight 1.
hidden_size=$(jq .config.hiddenSize <<<"$shard")
mapfile -t experts < <(jq '.experts[:.config.numExpertsPerTok][]' <<<"$shard")
request=$(jq \
  --arg hidden "$(repeated "$hidden_size" '\x80\x3f')" \
  --arg ids "$(little_endian "${experts[@]}")" \
  --arg weights "$(repeated "${#experts[@]}" '\x00\x00\x80\x3f')" \
  --argjson slots "${#experts[@]}" \
  '{modelFingerprint, placementEpoch, layer: .layers[0], numTokens: 1, topK: $slots,
    hiddenDtype: "DTYPE_BFLOAT16", replyDtype: "DTYPE_FLOAT32",
    hidden: $hidden, expertIds: $ids, weights: $weights}' <<<"$shard")
response=$(call expertd.v1.ExpertShard/Execute "$request")
jq '{receiptExperts, receiptPairs, timings}' <<<"$response"
echo "sum of the ${#experts[@]} experts' outputs:"
jq -r .partials <<<"$response" | base64 -d | od -An -v -t f4
