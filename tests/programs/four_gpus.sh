#!/bin/sh
# What `nvidia-smi -L` says on a machine of four GPUs.
echo "GPU 0: NVIDIA H200 (UUID: GPU-00-ab)"
echo "GPU 1: NVIDIA H200 (UUID: GPU-11-ab)"
echo "GPU 2: NVIDIA H200 (UUID: GPU-22-ab)"
echo "GPU 3: NVIDIA H200 (UUID: GPU-33-ab)"
