"""The nodes of the cluster of local.py, as Ray's autoscaler starts and ends them."""

import functools
from typing import Any
from unittest.mock import patch

from ray._private import parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class LocalNodes(FakeMultiNodeProvider):  # type: ignore[misc]  # Ray has no types for it
    """Ray's own nodes that are processes, with what they must not share on one machine.

    Each unpacks the code of jobs into a folder of its own: in a common one a node that starts deletes what others run.
    The head alone passes on what processes print: each would do so for all.
    """

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        with self.lock:  # of Ray, and reentrant
            own = {"runtime_env_dir_name": f"runtime_env_{self._next_node_id + 1}", "include_log_monitor": False}
            with patch.object(parameter, "RayParams", functools.partial(parameter.RayParams, **own)):
                super()._create_node_with_resources_and_labels(*arguments)
