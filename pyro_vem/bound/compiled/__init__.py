"""Terms of the bound as explicit affine maps, found by probing values; the model never runs again."""
