"""The parts that the four scripts are made of."""

import sam2_utils  # noqa: F401, which sets what torch and OpenCV read when they are imported
