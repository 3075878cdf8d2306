"""ManiFPT: fingerprints of generative models, as a distributed batch job on Ray.

The method is that of H. J. Song, M. Khayatkhoei, W. AbdAlmageed, "ManiFPT: Defining and Analyzing Fingerprints of
Generative Models", CVPR 2024. The modules are listed in the order in which an image passes them::

    storage -> manifest -> decode -> spaces -> reference -> projection -> artifacts -> shards -> pipeline
"""

import os

__version__ = "0.1.0"
__all__ = ["__version__"]

# Before Ray is imported. A forensic machine calls nobody; and the C++ core warns at every actor of an argument in the
# object store, which Ray Data puts there and which nobody can change.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
