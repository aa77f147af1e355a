"""Writers of whole outputs: they place encoded bytes in files, and know no numerics."""
