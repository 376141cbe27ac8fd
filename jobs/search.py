r"""Search a gallery of images by image, over HTTP with a web page or in the terminal.

Serve a folder of images with the newest checkpoint of a run; the page is at http://127.0.0.1:8000:

    python jobs/search.py --checkpoint ~/nsl_dist/runs/NAME --gallery ~/pictures
    curl --data-binary @photo.jpg 'http://127.0.0.1:8000/search?kind=float&k=10'

For shards or a data set of a known layout, the split used by evaluations is searched, or another one:

    python jobs/search.py --checkpoint ~/nsl_dist/runs/NAME --gallery s3://bucket/sop_shards --split train --port 8080

Print the neighbours of some images in the terminal, without a server:

    python jobs/search.py --checkpoint ~/nsl_dist/runs/NAME --gallery ~/pictures --query photo.jpg other.png

The service needs the extra `serve` (ray[serve], python-multipart). Ctrl-C stops it with exit status 130.
"""

import tyro

from nsl_dist.commandline import run_job
from nsl_dist.config import SearchConfig


def main() -> None:
    """Parse, embed the gallery, serve or print."""
    config = tyro.cli(SearchConfig, description=__doc__)

    if config.query:
        from nsl_dist.retrieval.image_search import (
            print_neighbours,  # after parsing: --help needs neither torch nor Ray
        )

        print_neighbours(config)
        return
    from nsl_dist.retrieval.http_service import run

    run(config)


if __name__ == "__main__":
    run_job(main)
