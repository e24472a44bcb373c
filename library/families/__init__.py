"""Model families (SD1, SD2): what they are called, how they are told apart, loaded, encoded, run and saved."""
