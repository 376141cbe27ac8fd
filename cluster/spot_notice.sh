#!/usr/bin/env bash
# Waits, on a node from the spot market, until its cloud says that it is about to be taken away, and tells Ray: trainings
# then write a checkpoint, and nothing new comes to this node. `ray up` starts it (see ray_cluster.yaml).
#
#   cluster/spot_notice.sh aws|gcp
set -euo pipefail

read_from() { wget --quiet --output-document=- --timeout=5 --tries=1 "$@"; }

case ${1-} in
  aws)
    METADATA=${METADATA:-http://169.254.169.254}/latest
    SECONDS_LEFT=110 # of two minutes
    is_noticed() {
      local token
      token=$(read_from --method=PUT --header="X-aws-ec2-metadata-token-ttl-seconds: 60" "$METADATA/api/token") &&
        read_from --header="X-aws-ec2-metadata-token: $token" "$METADATA/meta-data/spot/instance-action" # or 404
    }
    ;;
  gcp)
    METADATA=${METADATA:-http://169.254.169.254}/computeMetadata/v1
    SECONDS_LEFT=25 # of half a minute
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
