"""torch.compile and CUDA graphs: blocks of the policy, networks of rewards."""
