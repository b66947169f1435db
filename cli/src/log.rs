//! `millpond log …`: the log of a broker that is not running. The folder is locked meanwhile, so that
//! none can start.

mod dump;

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use millpond_wal::storage::{FolderStorage, Mapping};
use millpond_wal::{Finding, Harm, IndexRange, Options, VerifyReport, Wrong};
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::output::{self, Format};

#[derive(Debug, Subcommand)]
pub enum LogCommand {
    /// Read every byte and compare every checksum. Exits with 4 if something is damaged.
    Verify {
        /// The broker's data folder.
        dir: PathBuf,
    },
    /// Print every record.
    Dump(DumpArgs),
    /// Show what is lost above the newest snapshot, or accept the loss so that the broker can go on.
    Salvage {
        /// The broker's data folder.
        dir: PathBuf,
        /// Record the loss: the next start goes on without the damaged entries. Nothing is deleted.
        #[arg(long)]
        accept_loss: bool,
    },
}

#[derive(Debug, Args)]
pub struct DumpArgs {
    /// The broker's data folder.
    dir: PathBuf,
    /// The log index to begin at.
    #[arg(
        long,
        value_name = "INDEX",
        default_value_t = 0,
        hide_default_value = true
    )]
    from: u64,
    /// Most entries to print [default: all].
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

/// Does what the command says.
pub fn run(command: &LogCommand, format: Format) -> Result<(), Failure> {
    match command {
        LogCommand::Verify { dir } => verify(dir, format),
        LogCommand::Dump(args) => dump::run(args, &open(&args.dir)?, format),
        LogCommand::Salvage {
            dir,
            accept_loss: false,
        } => preview(dir, format),
        LogCommand::Salvage {
            dir,
            accept_loss: true,
        } => accept(dir, format),
    }
}

/// Opens the log of a data folder, or a log's own folder; makes neither.
fn open(dir: &Path) -> Result<FolderStorage, Failure> {
    let within = dir.join(millpond_broker::broker::LOG_FOLDER);
    let path = if within.is_dir() { &within } else { dir };
    std::fs::read_dir(path).map_err(|error| Failure::Read {
        path: path.to_owned(),
        error,
    })?;
    Ok(FolderStorage::open(path, Mapping::Off)?)
}

fn verify(dir: &Path, format: Format) -> Result<(), Failure> {
    let report = millpond_wal::verify(&open(dir)?)?;
    match format {
        Format::Json => output::json(&to_json(&report))?,
        Format::Human => tell(&report)?,
    }
    let damage = report.findings.iter().filter(|found| is_damage(found));
    match damage.count() {
        0 => Ok(()),
        count => Err(Failure::Damage { count }),
    }
}

/// A torn tail is what a power cut leaves: bytes that were never acknowledged.
const fn is_damage(finding: &Finding) -> bool {
    !matches!(finding.what, Wrong::Torn { .. } | Wrong::TornRecord { .. })
}

fn to_json(report: &VerifyReport) -> Value {
    json!({
        "store_id": output::hex(&report.store),
        "recovery_epoch": report.epoch,
        "segments": report.segments,
        "entries": report.entries,
        "records": report.records,
        "first_index": report.range.map(|range| range.first.0),
        "last_index": report.range.map(|range| range.last.0),
        "snapshot_index": report.snapshot.map(|index| index.0),
        "good": report.findings.iter().all(|found| !is_damage(found)),
        "findings": report.findings.iter().map(finding_json).collect::<Value>(),
    })
}

fn finding_json(finding: &Finding) -> Value {
    json!({
        "file": finding.file,
        "what": finding.what.to_string(),
        "first_byte": finding.bytes.as_ref().map(|bytes| bytes.start),
        "end_byte": finding.bytes.as_ref().map(|bytes| bytes.end),
        "harm": harm_name(finding.harm),
        "advice": harm_sentence(finding.harm),
        "damage": is_damage(finding),
    })
}

fn tell(report: &VerifyReport) -> Result<(), Failure> {
    let none = || "none".to_owned();
    output::facts(&[
        ("store", output::hex(&report.store)),
        ("epoch", report.epoch.to_string()),
        ("segments", report.segments.to_string()),
        ("entries", report.entries.to_string()),
        ("records", report.records.to_string()),
        ("range", report.range.map_or_else(none, |r| r.to_string())),
        (
            "snapshot",
            report.snapshot.map_or_else(none, |at| format!("at {at}")),
        ),
    ])?;
    output::line("")?;
    if report.findings.is_empty() {
        return output::line("all is well");
    }
    report.findings.iter().try_for_each(|found| {
        let harm = harm_sentence(found.harm);
        output::line(format!("{}: {}: {harm}", found.file, what(found)))
    })
}

fn what(finding: &Finding) -> String {
    match &finding.bytes {
        Some(bytes) => format!("{} (bytes {} to {})", finding.what, bytes.start, bytes.end),
        None => finding.what.to_string(),
    }
}

const fn harm_name(harm: Harm) -> &'static str {
    match harm {
        Harm::None => "none",
        Harm::Bodies => "bodies",
        Harm::State => "state",
    }
}

const fn harm_sentence(harm: Harm) -> &'static str {
    match harm {
        Harm::None => "no harm, a second copy or the next start makes up for it",
        Harm::Bodies => "messages are lost; the broker serves all others",
        Harm::State => {
            "the broker takes no writes: restore a backup, or accept the loss with `millpond log salvage`"
        }
    }
}

fn preview(dir: &Path, format: Format) -> Result<(), Failure> {
    let report = millpond_wal::verify(&open(dir)?)?;
    let mut losses = report.findings;
    losses.retain(|finding| finding.harm == Harm::State);
    match format {
        Format::Json => output::json(&json!({
            "accepted": false,
            "losses": losses.iter().map(finding_json).collect::<Value>(),
        }))?,
        Format::Human if losses.is_empty() => output::line("nothing has to be salvaged")?,
        Format::Human => {
            for loss in &losses {
                output::line(format!("{}: {}", loss.file, what(loss)))?;
            }
            output::line(format!(
                "to go on without them: millpond log salvage {} --accept-loss",
                dir.display()
            ))?;
        }
    }
    match losses.len() {
        0 => Ok(()),
        count => Err(Failure::Damage { count }),
    }
}

fn accept(dir: &Path, format: Format) -> Result<(), Failure> {
    let lost = millpond_wal::salvage_accept_loss(&open(dir)?, &Options::default())?;
    match format {
        Format::Json => output::json(&json!({
            "accepted": true,
            "losses": lost.iter().map(range_json).collect::<Value>(),
        })),
        Format::Human if lost.is_empty() => output::line("nothing has to be salvaged"),
        Format::Human => {
            for range in &lost {
                output::line(format!("given up: entries {range}"))?;
            }
            output::line(
                "the next start goes on without them: whole messages keep their offsets, lost ones are told as damaged, \
                 settings and settlements that only they told of are gone",
            )
        }
    }
}

fn range_json(range: &IndexRange) -> Value {
    json!({"first_index": range.first.0, "last_index": range.last.0})
}
