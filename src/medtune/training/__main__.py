"""Train as one rank of one or of many: `python -m medtune.training --config train.yaml`."""

from torch import distributed

from .launch import main

if __name__ == "__main__":
    main()
    if distributed.is_initialized():
        distributed.destroy_process_group()
