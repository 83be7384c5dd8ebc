"""Other data made into nnU-Net datasets: installed as `gasnet_nnunet.dataset_conversion`."""
