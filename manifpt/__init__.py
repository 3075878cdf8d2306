"""ManiFPT: fingerprints of generative models, as a distributed batch job on Ray.

The method is that of H. J. Song, M. Khayatkhoei, W. AbdAlmageed, "ManiFPT: Defining and Analyzing Fingerprints of
Generative Models", CVPR 2024. The modules are listed in the order in which an image passes them::

    storage -> manifest -> decode -> spaces -> reference -> projection -> artifacts -> shards -> pipeline
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
