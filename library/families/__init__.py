"""Model families: how they are recognised, loaded, encoded, run and saved."""
