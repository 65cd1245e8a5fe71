# %% [markdown]
# # Support tickets to JSON
# A data frame of tickets goes in, a data frame of answers comes out.

# %%
import tempfile
from pathlib import Path

import pandas as pd

from moebeam import load_job, run_job
from moebeam.jobs.demo.tickets import generate_tickets

HERE = Path(__file__).parent if "__file__" in globals() else Path.cwd()

# %% [markdown]
# Tickets from the demo's generator; your own data frame needs the columns that the template in job.toml names.

# %%
tickets = pd.DataFrame(
    [
        {"ticket_id": t.ticket_id, "customer_context": t.customer_context, "ticket_text": t.text}
        for t in generate_tickets(4, seed=1, split="held_out", num_customers=2)
    ]
)
tickets.head()

# %% [markdown]
# Tables are kept where `[output] path` says; here in a folder of this session.

# %%
output = Path(tempfile.mkdtemp(prefix="tickets-"))
answers = run_job(load_job(str(HERE / "job.toml"), [f"output.path={output}"]), tickets)

# %%
print(answers[["custom_id", "status", "output_json"]].to_string(index=False))
print(f"{(answers['status'] == 'ok').sum()} of {len(answers)} tickets answered; tables: {output}")
