"""The sample inside the package: 1,797 real handwritten digits and 500 images from each of four generators.

``digits.parquet`` has one row an image: ``image`` (a struct of PNG ``bytes`` and a ``path``), ``source`` (``real``,
``gan``, ``vae``, ``flow`` or ``diffusion``), ``split`` and ``digit`` (the label of a real image, null for a generated
one). Every image is a grey 32x32 PNG; ask Pillow to ``convert("RGB")`` it to three equal channels.

The real ones are the 8x8 digits that scikit-learn ships (the test set of "Optical Recognition of Handwritten Digits"
by E. Alpaydin and C. Kaynak, 1998, UCI), enlarged by a bicubic filter. The ``reference`` split is the 1,497 that
the generators learned from; ``query`` is everything to be attributed: the 300 reals that no generator has seen, and
all 2,000 generated images. ``manifpt.sample.train_generators`` trained the four generators and wrote the file. Its
seed, versions, steps, losses and checks against copying are in the file's metadata, as JSON under ``manifpt.sample``.
"""

from pathlib import Path

__all__ = ["SAMPLE_PATH"]

SAMPLE_PATH = Path(__file__).parent / "digits.parquet"
