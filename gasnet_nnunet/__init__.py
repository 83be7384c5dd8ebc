"""GASNet for nnU-Net: lesion segmentation from one voxel-labelled CT and many that are only diagnosed."""

__version__ = "0.1.0"
