"""What runs inside the guest. Only ``protocol`` is imported by the host."""
