import sys

from lightning_bln.reproduce.command import main

sys.exit(main())
