-- Views over the tables of one moebeam run, for DuckDB.
--
--   cd OUTPUT && duckdb -init views.sql
--
-- From elsewhere, or for a run in an object store, name the folder before this file is read; it may be changed later:
--   SET VARIABLE moebeam_run = 's3://bucket/run';
--
-- Amounts are exact decimals. Amounts of different currencies are never added: every view of money is grouped by
-- currency, and lines without a price stand under a null currency with a null amount. Tokens that a provider did not
-- count are null and in no sum; estimates of them stand in columns of their own.

SET VARIABLE moebeam_run = coalesce(getvariable('moebeam_run'), '.');

CREATE OR REPLACE VIEW results AS
SELECT * FROM read_parquet(getvariable('moebeam_run') || '/results/*.parquet', union_by_name = true);

CREATE OR REPLACE VIEW rejects AS
SELECT * FROM read_parquet(getvariable('moebeam_run') || '/rejects/*.parquet', union_by_name = true);

-- Of each row the sample that the model held likeliest, by the mean log probability of its tokens; without
-- `[sampling] logprobs` its first one.
CREATE OR REPLACE VIEW best_samples AS
SELECT * FROM results
QUALIFY row_number() OVER (
  PARTITION BY source_file, source_row ORDER BY list_avg(logprobs) DESC NULLS LAST, sample
) = 1;

-- One line an attempt, with the UTC day, month and hour of its start, which decides its price.
CREATE OR REPLACE VIEW ledger AS
SELECT *,
       strftime(started_at AT TIME ZONE 'UTC', '%Y-%m-%d')        AS day,
       strftime(started_at AT TIME ZONE 'UTC', '%Y-%m')           AS month,
       strftime(started_at AT TIME ZONE 'UTC', '%Y-%m-%dT%H:00Z') AS hour,
       coalesce(cache_hit_tokens, 0) + cache_miss_tokens          AS prompt_tokens,
       visible_output_tokens + reasoning_tokens                   AS completion_tokens
FROM read_parquet(getvariable('moebeam_run') || '/ledger/*.parquet', union_by_name = true);

-- One line a paid attempt of a run that may be unfinished. `state` is `committed` (in the ledger), `journaled` (an
-- answer of a shard that is not finished; the next launch takes it over) or `wasted` (an answer that was not used).
-- The pattern means ledger/ and partial/, which only an unfinished run has: DuckDB refuses one that finds no file.
-- A journaled answer that the ledger has taken over since counts there.
CREATE OR REPLACE VIEW spending AS
SELECT CASE outcome WHEN 'journaled' THEN 'journaled' WHEN 'wasted' THEN 'wasted' ELSE 'committed' END AS state,
       *,
       coalesce(cache_hit_tokens, 0) + cache_miss_tokens AS prompt_tokens,
       visible_output_tokens + reasoning_tokens          AS completion_tokens
FROM read_parquet(getvariable('moebeam_run') || '/[lp][ea][dr][gt][ei][ra]*/*.parquet', union_by_name = true)
QUALIFY outcome <> 'journaled'
     OR count(*) FILTER (outcome <> 'journaled') OVER (PARTITION BY shard, journal) = 0;

CREATE OR REPLACE VIEW spending_by_state AS
SELECT state, currency,
       count(*)                       AS attempts,
       count(*) FILTER (cost IS NULL) AS unpriced,
       sum(prompt_tokens)             AS prompt_tokens,
       sum(completion_tokens)         AS completion_tokens,
       sum(cost)                      AS cost,
       sum(num_lost_calls)            AS lost_calls,
       sum(lost_cost_at_most)         AS lost_cost_at_most
FROM spending GROUP BY state, currency ORDER BY state, currency;

CREATE OR REPLACE MACRO ledger_by(name) AS TABLE
SELECT CASE name
         WHEN 'tenant' THEN tenant WHEN 'cost_center' THEN cost_center WHEN 'provider' THEN provider
         WHEN 'model' THEN model WHEN 'model_revision' THEN model_revision WHEN 'outcome' THEN outcome
         WHEN 'price_line' THEN price_line WHEN 'price_book' THEN price_book WHEN 'cost_basis' THEN cost_basis
         WHEN 'finish_reason' THEN finish_reason WHEN 'error_type' THEN error_type WHEN 'shard' THEN shard
         WHEN 'day' THEN day WHEN 'month' THEN month WHEN 'hour' THEN hour
         ELSE tags[name]
       END                                                             AS key,
       currency,
       count(*)                                                        AS attempts,
       count(*) FILTER (cost IS NULL)                                  AS unpriced,
       count(*) FILTER (prompt_tokens IS NULL OR completion_tokens IS NULL) AS unknown_usage,
       sum(prompt_tokens)                                              AS prompt_tokens,
       CASE WHEN count(*) = count(cache_hit_tokens) THEN sum(cache_hit_tokens) END AS cached_tokens,
       sum(completion_tokens)                                          AS completion_tokens,
       sum(reasoning_tokens)                                           AS reasoning_tokens,
       sum(cost)                                                       AS cost,
       sum(cost_allocated)                                             AS cost_allocated,
       sum(accelerator_s)                                              AS accelerator_s
FROM ledger GROUP BY 1, currency ORDER BY cost DESC NULLS LAST, key;

CREATE OR REPLACE VIEW cost_by_tenant      AS SELECT key AS tenant,      * EXCLUDE (key) FROM ledger_by('tenant');
CREATE OR REPLACE VIEW cost_by_cost_center AS SELECT key AS cost_center, * EXCLUDE (key) FROM ledger_by('cost_center');
CREATE OR REPLACE VIEW cost_by_day         AS SELECT key AS day,         * EXCLUDE (key) FROM ledger_by('day');
CREATE OR REPLACE VIEW cost_by_model       AS SELECT key AS model,       * EXCLUDE (key) FROM ledger_by('model');
CREATE OR REPLACE VIEW cost_by_outcome     AS SELECT key AS outcome,     * EXCLUDE (key) FROM ledger_by('outcome');

-- One row a token class: what was used, its price per 1,000,000 tokens, what it came to.
CREATE OR REPLACE VIEW token_classes AS
SELECT tenant, cost_center, day, provider, model, price_line, currency, token_class, unit_price,
       sum(tokens) AS tokens, sum(amount) AS amount
FROM (
  SELECT tenant, cost_center, day, provider, model, price_line, currency,
         unnest(['cache_hit', 'cache_miss', 'visible_output', 'reasoning'])                        AS token_class,
         unnest([cache_hit_tokens, cache_miss_tokens, visible_output_tokens, reasoning_tokens])    AS tokens,
         unnest([coalesce(cache_hit_price, cache_miss_price), cache_miss_price, output_price, output_price])
                                                                                                    AS unit_price,
         unnest([cache_hit_cost, cache_miss_cost, visible_output_cost, reasoning_cost])            AS amount
  FROM ledger
) GROUP BY ALL;

-- Without rows where the run is sound; `moebeam run` checks the same before it writes the manifest.
CREATE OR REPLACE VIEW broken_invariants AS
SELECT 'an amount is not tokens x price' AS what, custom_id AS found FROM (
  SELECT custom_id,
         unnest([coalesce(cache_hit_tokens, 0), cache_miss_tokens, visible_output_tokens, reasoning_tokens]) AS tokens,
         unnest([coalesce(cache_hit_price, cache_miss_price), cache_miss_price, output_price, output_price])
           AS unit_price,
         unnest([cache_hit_cost, cache_miss_cost, visible_output_cost, reasoning_cost]) AS amount
  FROM ledger WHERE cost IS NOT NULL
) WHERE CAST(tokens AS DECIMAL(18, 0)) * CAST(unit_price AS DECIMAL(18, 6))
     <> CAST(amount AS DECIMAL(31, 12)) * CAST(1000000 AS DECIMAL(7, 0))
UNION ALL
SELECT 'token classes do not add up to the cost', custom_id FROM ledger
WHERE cost <> cache_hit_cost + cache_miss_cost + visible_output_cost + reasoning_cost;
