"""Train as one rank of one or of many: `python -m medtune.training --config train.yaml`."""

from .launch import leave_ranks, main

if __name__ == "__main__":
    main()
    leave_ranks()
