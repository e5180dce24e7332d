#!/usr/bin/env bash
# Runs a config on every worker of a Cloud TPU VM pod, with gcloud, from your own machine.
#
#   tools/launch/tpu_pod.sh NAME ZONE configs/NAME.py [--config.KEY=VALUE ...]
#
# NAME is of a TPU that exists, for instance by
#   gcloud compute tpus queued-resources create NAME --node-id=NAME --zone=ZONE \
#     --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite
# with this repository in ~/sdprune_jax on all workers. The working directory of the run has to be
# one that all of them share: say --config.workdir=/mnt/SHARED/NAME.
set -euo pipefail
if (( $# < 3 )); then sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; fi
name=$1 zone=$2 config=$3
shift 3
words=$(printf ' %q' --config="$config" --config.mesh.coordinator=auto "$@")
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="
  cd ~/sdprune_jax
  test -x .venv/bin/python || python3 -m venv .venv
  .venv/bin/python -m pip install --quiet '.[tpu]'
  exec .venv/bin/python -m sdprune_jax.main$words"
