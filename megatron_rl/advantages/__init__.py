"""Credit: from rewards to advantages. Pure functions of tensors."""
