//! `palisade pki`: an authority and its certificates, for a demo or a small site.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Subcommand;
use palisade_transport::{
    name::{Name, is_name},
    pki,
};

/// Where certificates are kept, unless the command line says otherwise.
const FOLDER: &str = "/etc/palisade/pki";
const DOMAIN: &str = "palisade.local";

#[derive(Subcommand)]
pub(crate) enum Pki {
    /// Make the authority: ca.pem, and its key, which signs everything else and belongs on no node
    Init {
        #[command(flatten)]
        place: Place,
        /// Days that it is valid for
        #[arg(long, default_value_t = 3650)]
        days: u32,
    },
    /// Make the collector's certificate: collector.pem and collector-key.pem
    Collector {
        #[command(flatten)]
        place: Place,
        /// Host names and IP addresses under which agents and readers reach it
        #[arg(required = true)]
        addresses: Vec<String>,
        /// Days that it is valid for
        #[arg(long, default_value_t = 90)]
        days: u32,
    },
    /// Make a node's certificate: node-NAME.pem and node-NAME-key.pem
    ///
    /// The agent that has it delivers records of this node and of no other, whatever its messages say.
    Node {
        #[command(flatten)]
        place: Place,
        /// The node's name in records
        name: String,
        /// Days that it is valid for
        #[arg(long, default_value_t = 90)]
        days: u32,
    },
    /// Make a reader's certificate: reader-NAME.pem and reader-NAME-key.pem
    Reader {
        #[command(flatten)]
        place: Place,
        /// Who asks
        name: String,
        /// Days that it is valid for
        #[arg(long, default_value_t = 90)]
        days: u32,
    },
    /// Write revoked.pem: these certificates count no more, and all others do
    Revoke {
        #[command(flatten)]
        place: Place,
        /// Certificate files; none: nothing is revoked
        certificates: Vec<PathBuf>,
    },
}

#[derive(clap::Args, Clone)]
pub(crate) struct Place {
    /// Folder of the authority, and of what it signs
    #[arg(long, default_value = FOLDER)]
    folder: PathBuf,
    /// Trust domain in the certificates' names
    #[arg(long, default_value = DOMAIN)]
    domain: String,
}

pub(crate) fn run(command: Pki) -> Result<()> {
    match command {
        Pki::Init { place, days } => {
            std::fs::create_dir_all(&place.folder)
                .with_context(|| format!("cannot make {}", place.folder.display()))?;
            check_domain(&place.domain)?;
            pki::make_authority(&place.folder, &place.domain, days)?;
            say(&place.folder, &[pki::CA, pki::CA_KEY, pki::REVOKED]);
        }
        Pki::Collector { place, addresses, days } => {
            issue(&place, "collector", &Name::Collector, &addresses, days)?;
        }
        Pki::Node { place, name, days } => {
            check(&name)?;
            issue(&place, &format!("node-{name}"), &Name::Node(name), &[], days)?;
        }
        Pki::Reader { place, name, days } => {
            check(&name)?;
            issue(&place, &format!("reader-{name}"), &Name::Reader(name), &[], days)?;
        }
        Pki::Revoke { place, certificates } => {
            let certificates: Vec<&Path> = certificates.iter().map(PathBuf::as_path).collect();
            pki::revoke(&place.folder, &certificates)?;
            say(&place.folder, &[pki::REVOKED]);
        }
    }
    Ok(())
}

fn issue(place: &Place, file: &str, name: &Name, addresses: &[String], days: u32) -> Result<()> {
    check_domain(&place.domain)?;
    if !place.folder.join(pki::CA_KEY).exists() {
        bail!("no authority is in {}; make one with `palisade pki init`", place.folder.display());
    }
    pki::issue(&place.folder, file, name, &place.domain, addresses, days)?;
    say(&place.folder, &[&format!("{file}.pem"), &format!("{file}-key.pem")]);
    Ok(())
}

fn check(name: &str) -> Result<()> {
    if !is_name(name) {
        bail!("{name:?} is no name; use letters, digits, '-', '.' and '_', at most 253");
    }
    Ok(())
}

fn check_domain(domain: &str) -> Result<()> {
    if !is_name(domain) {
        bail!("--domain: {domain:?} is no domain; use letters, digits, '-' and '.'");
    }
    Ok(())
}

fn say(folder: &Path, files: &[&str]) {
    for file in files {
        println!("{}", folder.join(file).display());
    }
}
