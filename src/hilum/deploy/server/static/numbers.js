// How numbers are written, once.

/** A share of 0 to 1 as a percentage: as many digits as can be told apart. null is a dash. */
export function percent(share) {
  if (share === null || share === undefined) return "–";
  const value = share * 100;
  if (value > 0 && value < 0.1) return "< 0.1 %";
  if (value < 9.95) return `${value.toFixed(1)} %`;
  if (value > 99 && value < 100) return "> 99 %";
  return `${Math.round(value)} %`;
}

/** Bytes as people say them. */
export function bytes(count) {
  if (count < 1024) return `${count} B`;
  if (count < 1024 * 1024) return `${Math.round(count / 1024)} KB`;
  const value = count / (1024 * 1024);
  return `${value < 10 ? value.toFixed(1) : Math.round(value)} MB`;
}

/** A duration in seconds, without more precision than anybody needs. */
export function seconds(count) {
  return count < 60 ? `${count} s` : `${Math.floor(count / 60)} min ${count % 60} s`;
}

const THRESHOLD_NAMES = { f1: "F1", youden: "Youden" };

/** The name of an operating point in words; one that this page does not know is shown as the server writes it. */
export function thresholdName(name) {
  const fixed = /^(sens_at_spec|spec_at_sens)([0-9.]+)$/.exec(name);
  if (fixed) return `${fixed[2]} % ${fixed[1] === "sens_at_spec" ? "specificity" : "sensitivity"}`;
  return THRESHOLD_NAMES[name] ?? name;
}

const LOWEST = 0.001;

/** Where a probability lies on the axis, 0 to 1. The logarithmic one begins at 0.1 %, for findings that are rare. */
export function position(probability, scale) {
  if (scale !== "log") return Math.min(1, Math.max(0, probability));
  return Math.min(1, Math.max(0, 1 - Math.log10(Math.max(probability, LOWEST)) / Math.log10(LOWEST)));
}

/** Ticks of the axis: where, and what is written. */
export const AXES = {
  linear: [[0, "0"], [0.5, "50"], [1, "100 %"]],
  log: [[0.001, "0.1"], [0.01, "1"], [0.1, "10"], [1, "100 %"]],
};
