"""The two vocabularies of the anatomy-observation matrix: 51 anatomies and 75 observations.

Source: MeDSLIP's published lists, which are those of MedKLIP and AGXNet; the descriptions are in our words.
"""

ANATOMIES: tuple[str, ...] = (
    "trachea", "left_hilar", "right_hilar", "hilar_unspec", "left_pleural", "right_pleural",
    "pleural_unspec", "heart_size", "heart_border", "left_diaphragm", "right_diaphragm", "diaphragm_unspec",
    "retrocardiac", "lower_left_lobe", "upper_left_lobe", "lower_right_lobe", "middle_right_lobe",
    "upper_right_lobe", "left_lower_lung", "left_mid_lung", "left_upper_lung", "left_apical_lung",
    "left_lung_unspec", "right_lower_lung", "right_mid_lung", "right_upper_lung", "right_apical_lung",
    "right_lung_unspec", "lung_apices", "lung_bases", "left_costophrenic", "right_costophrenic",
    "costophrenic_unspec", "cardiophrenic_sulcus", "mediastinal", "spine", "clavicle", "rib", "stomach",
    "right_atrium", "right_ventricle", "aorta", "svc", "interstitium", "parenchymal", "cavoatrial_junction",
    "cardiopulmonary", "pulmonary", "lung_volumes", "unspecified", "other",
)  # fmt: skip

#: Anatomy of an observation that names none, and of an anatomy no rule knows.
UNSPECIFIED, OTHER = "unspecified", "other"

#: Observation -> what it means on a chest radiograph, in the order of the matrix's second axis.
DESCRIPTIONS: dict[str, str] = {
    "normal": "The structure looks normal and shows no disease.",
    "clear": "The lungs are clear and free of disease.",
    "sharp": "The edge of the structure is well defined, as in health.",
    "sharply": "The structure can be seen distinctly.",
    "unremarkable": "The structure is normal; mostly said of the cardiac and mediastinal outline.",
    "intact": "The bone is complete, without a fracture.",
    "stable": "The structure is normal and has not changed.",
    "free": "Free air, seen together with pneumothorax, atelectasis, pneumoperitoneum or emphysema.",
    "effusion": "Too much fluid in the pleural space around the lung.",
    "opacity": "A hazy area of lung where fluid, collapse, fibrosis or tumour takes the place of air.",
    "pneumothorax": "Air that should not be there, between the lung and the chest wall.",
    "edema": "Too much fluid in the tissue and air spaces of the lung.",
    "atelectasis": "Part of the lung is collapsed or closed; volume is lost and gas exchange is reduced.",
    "tube": "A drain in the pleural space or mediastinum that removes air, fluid, blood, chyle or pus.",
    "consolidation": "Lung filled with liquid instead of air, a sign of pneumonia.",
    "process": "An acute process: something in the structure is not as it should be.",
    "abnormality": "There is disease; the structure is not normal.",
    "enlarge": "The structure, usually the heart or its outline, is bigger than normal.",
    "tip": "The end of a tube.",
    "low": "Low lung volumes, possibly from restrictive disease.",
    "pneumonia": "Inflammation of the small air sacs of the lung, with opacity, effusion or consolidation.",
    "line": "A line for venous access, such as a PICC line.",
    "congestion": "Fluid collects in the lungs and hinders gas exchange.",
    "catheter": "A tube placed in the body to drain fluid.",
    "cardiomegaly": "The heart is enlarged.",
    "fracture": "A broken bone, usually a rib.",
    "air": "Free gas in the pleural space, which hints at a pneumothorax.",
    "tortuous": "The aorta is slightly twisted.",
    "lead": "The leading end of a tube or device.",
    "disease": "Something abnormal is present.",
    "calcification": "Calcium has been deposited in the lung.",
    "prominence": "Some finding stands out.",
    "device": "Support equipment such as a PICC, valve, pacemaker, ICD or port.",
    "engorgement": "Pulmonary vessels are swollen because blood does not flow off freely.",
    "picc": "A long thin catheter from a vein of the arm to the large veins near the heart.",
    "clip": "A surgical or vascular clip.",
    "elevation": "The structure stands higher than its normal place.",
    "expand": "The lungs are well expanded and there is no pneumothorax.",
    "nodule": "A small, circumscribed density in the lung.",
    "wire": "Wires from a sternotomy in the midline of the chest.",
    "fluid": "Liquid in the lung, which may mean edema.",
    "degenerative": "Cells are changing for the worse in a lasting, degenerative process.",
    "pacemaker": "A cardiac pacemaker.",
    "thicken": "The pleura is thickened after infection, empyema, tuberculosis or cancer.",
    "marking": "Interstitial or bronchovascular markings.",
    "scar": "Fibrous tissue left by an injury.",
    "hyperinflate": "The lungs are larger than normal because air is trapped in them.",
    "blunt": "The costophrenic angle is blunted, usually by an effusion.",
    "loss": "Lung volume is lost through obstruction, fibrosis, effusion, rib injury or heart failure.",
    "widen": "The mediastinum is wider than normal.",
    "collapse": "The lung has collapsed, by pneumothorax or atelectasis.",
    "density": "How much mass a substance has in its volume.",
    "emphysema": "Air spaces of the lung are enlarged and filled with air.",
    "aerate": "Air passes through the lung.",
    "mass": "An abnormal growth in the lung that may be cancer.",
    "crowd": "Bronchovascular structures are crowded together, a sign of lost volume.",
    "infiltrate": "Something denser than air in the lung, as in pneumonia, tuberculosis or sarcoidosis.",
    "obscure": "The structure is hard to see.",
    "deformity": "A part of the body is misshapen or injured.",
    "hernia": "Lung bulges out through the chest wall.",
    "drainage": "Equipment that drains through a tube.",
    "distention": "The structure is enlarged, as if blown up.",
    "shift": "The mediastinum is displaced to one side by unequal pressure.",
    "stent": "A stent in the trachea.",
    "pressure": "Pressure in the pulmonary veins.",
    "lesion": "A nodule or spot in the lung that is not normal.",
    "finding": "Something has been observed, usually not normal.",
    "borderline": "The heart is at the upper limit of its size but not enlarged.",
    "hardware": "Medical hardware of any kind.",
    "dilation": "The structure is wider or more open than normal.",
    "chf": "Congestive heart failure: the heart pumps too weakly and fluid backs up into the lungs.",
    "redistribution": "Veins of the upper lung are distended by heart failure or too much fluid.",
    "aspiration": "Pneumonia from breathing in food or liquid.",
    "tail_abnorm_obs": "A disease that is very rare.",
    "excluded_obs": "An observation that reports seldom make.",
}

OBSERVATIONS: tuple[str, ...] = tuple(DESCRIPTIONS)

#: The observations that state health; they come first.
NORMAL_OBSERVATIONS: tuple[str, ...] = OBSERVATIONS[:8]
#: Buckets of every other lemma: abnormal ones, and words that are no finding.
TAIL, EXCLUDED = "tail_abnorm_obs", "excluded_obs"
