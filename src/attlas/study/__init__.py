"""Running studies: `attlas study`, its journal, records, pictures and the page of claims."""
