"""The one seam into TRL (`plug`), and one file per kind of stage."""
