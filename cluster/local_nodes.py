"""The nodes of the cluster of local.py, as Ray's autoscaler starts and ends them."""

from nsl_dist.ray_internals import node_provider

LocalNodes = node_provider()
