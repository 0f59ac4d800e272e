from momkit.mechanisms.reference import scan_reference as scan_chunked  # placeholder until the chunked form lands
