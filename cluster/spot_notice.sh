#!/usr/bin/env bash
# Runs on spot nodes. Waits for the cloud's preemption notice and drains the Ray node, so that trainings write a
# checkpoint and no new work is scheduled on it. Started by `ray up` (see ray_cluster.yaml).
#
#   cluster/spot_notice.sh aws|gcp
set -euo pipefail

read_from() { wget --quiet --output-document=- --timeout=5 --tries=1 "$@"; }

case ${1-} in
  aws)
    METADATA=${METADATA:-http://169.254.169.254}/latest
    SECONDS_LEFT=110 # AWS gives two minutes
    is_noticed() {
      local token
      token=$(read_from --method=PUT --header="X-aws-ec2-metadata-token-ttl-seconds: 60" "$METADATA/api/token") &&
        read_from --header="X-aws-ec2-metadata-token: $token" "$METADATA/meta-data/spot/instance-action" # 404 until then
    }
    ;;
  gcp)
    METADATA=${METADATA:-http://169.254.169.254}/computeMetadata/v1
    SECONDS_LEFT=25 # Google Cloud gives 30 seconds
    is_noticed() {
      read_from --header="Metadata-Flavor: Google" "$METADATA/instance/preempted" | grep TRUE
    }
    ;;
  *)
    echo "usage: $0 aws|gcp" >&2
    exit 2
    ;;
esac

until is_noticed; do sleep 2; done
ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message "notice of the spot market" \
  --deadline-remaining-seconds "$SECONDS_LEFT"
