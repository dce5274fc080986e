"""Compressed variants of linear layers: Hessians, GPTQ, grids and packing."""
