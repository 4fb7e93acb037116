//! Records that are missing, and peers that the collector did not let in.

use palisade_proto::v1::{Gap, Refusal};

use super::Says;
use crate::{common::Common, line::Line};

impl Says for Gap {
    fn line(&self, _of: Common<'_>) -> Line {
        Line::new("GAP", "", format!("{} records missing: {}", self.count, self.cause))
    }
}

impl Says for Refusal {
    fn line(&self, _of: Common<'_>) -> Line {
        let detail = format!("{} peers at {}: {}", self.count, self.address, self.why);
        Line::new("refused", &self.peer, detail)
    }
}
