"""Node provider through which Ray's autoscaler starts and stops the nodes of local.py."""

from nsl_dist.ray_internals import node_provider

LocalNodes = node_provider()
