"""What is free on a GPU for this process."""

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that tensors can still take on a CUDA device: of the card, and of the share that the process may take."""
    free, total = torch.cuda.mem_get_info(device)
    reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
    free += reserved - allocated
    share = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return free if share is None else min(free, int(share(device) * total) - allocated)
